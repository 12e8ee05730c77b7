"""What answers cost, and a purse that cannot be overdrawn. Knows nothing of wires and stores.

Before a request is sent, the most that it can cost is reserved; when its answer is read, what it did cost is settled.
Spent + reserved stays below the cap at every instant. Inside the purse money is whole nano-dollars: sums are exact.
"""

from __future__ import annotations

import asyncio
import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from potstill.core.errors import BudgetError, DataError, RecipeError, unknown
from potstill.core.writing import Request, Usage
from potstill.stores.requests import Bill

NANO = 10**9
UNKNOWN = "unknown"
TABLE = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars per million tokens, as of a day."""

    input: float
    output: float
    cached: float | None = None
    """For input tokens that the server had in its cache; None: as any input."""
    reasoning: float | None = None
    """For output tokens spent on thinking; None: as any output."""
    as_of: str = ""

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached", "reasoning"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise RecipeError(f"price.{name}: found {value!r}, expected dollars per million tokens, 0 or more.")

    @property
    def is_free(self) -> bool:
        return not (self.input or self.output or self.cached or self.reasoning)

    def of(self, usage: Usage) -> float:
        """Dollars for what was used. `cached` is part of `input`, `reasoning` of `output`."""
        cached = self.input if self.cached is None else self.cached
        reasoning = self.output if self.reasoning is None else self.reasoning
        dollars = (usage.input - usage.cached) * self.input + usage.cached * cached
        return (dollars + (usage.output - usage.reasoning) * self.output + usage.reasoning * reasoning) / 1e6

    def most(self, input_tokens: int, output_tokens: int) -> float:
        """Dollars at most for so many tokens, whatever kind they turn out to be."""
        given = max(self.input, self.cached or 0.0)
        written = max(self.output, self.reasoning or 0.0)
        return (input_tokens * given + output_tokens * written) / 1e6

    def bound(self, request: Request, input_tokens: int) -> float:
        """Dollars at most for a request. Raises RecipeError where nothing bounds its answer."""
        written = max(self.output, self.reasoning or 0.0)
        if request.max_tokens is None and written:
            raise RecipeError(
                f"step '{request.step}': its requests have no max_tokens, so nothing bounds what an answer costs and "
                "the budget cannot be kept. Set max_tokens, or leave the budget out."
            )
        return self.most(input_tokens, request.max_tokens or 0)

    def times(self, factor: float) -> Price:
        """The price with a discount: half for most providers' batch jobs."""
        cached = None if self.cached is None else self.cached * factor
        reasoning = None if self.reasoning is None else self.reasoning * factor
        return Price(
            input=self.input * factor, output=self.output * factor, cached=cached, reasoning=reasoning, as_of=self.as_of
        )


FREE = Price(input=0.0, output=0.0)


def price_of(given: float | str | Mapping[str, float | str] | Price, *, model: str) -> Price | None:
    """The price that the user's word names; None is the knowing choice "unknown".

    given: a Price or a mapping of its fields; 0 for a model that costs nothing; "unknown"; "table" for the one shipped;
    or the path of a YAML table. Raises RecipeError for a model that the table does not have.
    """
    if isinstance(given, Price):
        return given
    if isinstance(given, Mapping):
        return _read_price(given, place="price")
    if isinstance(given, str) and given == UNKNOWN:
        return None
    if isinstance(given, str):
        return find_price(
            model, read_prices(Path(__file__).with_name("prices.yaml") if given == TABLE else Path(given))
        )
    if given != 0:
        raise RecipeError(
            f"price: found {given!r}, expected {{input: ..., output: ...}} in dollars per million tokens."
        )
    return FREE


def read_prices(path: Path) -> Mapping[str, Price]:
    """A table of prices: `models: {name: {input:, output:, ...}}`, and `as_of` for all. Raises DataError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as a table of prices: {error}.") from error
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict) or not all(isinstance(entry, dict) for entry in models.values()):
        raise DataError(f"{path}: expected 'models:' with {{input: ..., output: ...}} for each name.")
    day = str(content.get("as_of", ""))
    return {str(name): _read_price({"as_of": day, **entry}, place=f"{path}, {name}") for name, entry in models.items()}


def find_price(model: str, prices: Mapping[str, Price]) -> Price:
    """By the model's name, a provider's prefix and a date at its end left out if need be."""
    names = (model, model.rpartition("/")[2], _undated(model.rpartition("/")[2]))
    for name in names:
        if name in prices:
            return prices[name]
    raise RecipeError(
        f"price: nothing says what '{model}' costs. Give price: {{input: ..., output: ...}} in dollars per million "
        "tokens, price: 0 if it costs nothing, or price: unknown to go without; a budget needs a price."
    )


@dataclass(slots=True, eq=False)
class _Account:
    """Of the run, of a step or of a model, in nano-dollars."""

    name: str
    cap: float
    spent: int = 0
    reserved: int = 0

    def fits(self, amount: int) -> bool:
        return self.spent + self.reserved + amount <= self.cap


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Money set apart for one request."""

    amount: int
    accounts: tuple[_Account, ...]


class Purse:
    """Caps in dollars for a run and, by name, for its steps and models.

    past: what the ledger of the store has for the run. What an interrupted request may have cost counts as spent.
    """

    def __init__(
        self,
        cap: float = math.inf,
        *,
        steps: Mapping[str, float] | None = None,
        models: Mapping[str, float] | None = None,
        past: Iterable[Bill] = (),
    ) -> None:
        self._run = _Account("the run", _cap(cap, "budget"))
        self._steps = {name: _Account(f"step '{name}'", _cap(c, f"budget.{name}")) for name, c in (steps or {}).items()}
        self._models = {name: _Account(name, _cap(c, f"budget.{name}")) for name, c in (models or {}).items()}
        self._waiting: list[asyncio.Future[None]] = []
        for bill in past:
            for account in self._accounts(bill.step, bill.writer):
                account.spent += _up(bill.spent) + _up(bill.maybe)

    @property
    def is_capped(self) -> bool:
        accounts = (self._run, *self._steps.values(), *self._models.values())
        return any(account.cap < math.inf for account in accounts)

    @property
    def spent(self) -> float:
        """Dollars, interrupted requests of earlier calls included."""
        return self._run.spent / NANO

    @property
    def reserved(self) -> float:
        """Dollars for requests under way."""
        return self._run.reserved / NANO

    def spent_on(self, model: str) -> float:
        return self._accounts("", model)[2].spent / NANO

    async def reserve(self, dollars: float, *, step: str, model: str) -> Hold:
        """Set money apart, waiting while requests under way might leave enough of theirs.

        Raises BudgetError where not even that would do.
        """
        hold = Hold(_up(dollars), self._accounts(step, model))
        while not all(account.fits(hold.amount) for account in hold.accounts):
            for account in hold.accounts:
                if account.spent + hold.amount > account.cap:
                    raise _spent_up(account, hold.amount)
            ready = asyncio.get_running_loop().create_future()
            self._waiting.append(ready)
            await ready
        for account in hold.accounts:
            account.reserved += hold.amount
        return hold

    def settle(self, hold: Hold, dollars: float) -> None:
        """What the request did cost, instead of what was reserved; 0 releases it."""
        amount = _up(dollars)
        for account in hold.accounts:
            account.reserved -= hold.amount
            account.spent += amount
        self._wake()

    def correct(self, maybe: float, dollars: float, *, step: str, model: str) -> None:
        """An interrupted request of the past, counted at `maybe`, turns out to have cost `dollars`."""
        for account in self._accounts(step, model):
            account.spent += _up(dollars) - _up(maybe)
        self._wake()

    def _accounts(self, step: str, model: str) -> tuple[_Account, _Account, _Account]:
        if step not in self._steps:
            self._steps[step] = _Account(f"step '{step}'", math.inf)
        if model not in self._models:
            self._models[model] = _Account(model, math.inf)
        return (self._run, self._steps[step], self._models[model])

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for ready in waiting:
            if not ready.done():
                ready.set_result(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What a run would cost, judged by a sample of its requests, in dollars."""

    expected: float
    most: float
    """If every answer were as dear as the dearest of the sample."""
    num_sampled: int


def quote(price: Price, sample: Iterable[Usage], *, num_requests: int) -> Quote:
    """From what a few requests used to what all of them will cost."""
    costs = [price.of(usage) for usage in sample]
    if not costs:
        raise DataError("A quote needs at least one answered request to judge by.")
    mean = sum(costs) / len(costs)
    return Quote(expected=mean * num_requests, most=max(costs) * num_requests, num_sampled=len(costs))


def dollars_per_row(dollars: float, num_accepted: int) -> float:
    """Cost of one accepted row, the rejected ones' share included; infinite where money brought none."""
    if num_accepted:
        return dollars / num_accepted
    return math.inf if dollars else 0.0


def _read_price(given: Mapping[str, float | str], *, place: str) -> Price:
    known = [f.name for f in fields(Price)]
    for name in given:
        if name not in known:
            raise unknown(place, str(name), known, noun="part of a price")
    for name in ("input", "output"):
        if name not in given:
            raise RecipeError(f"{place}: a price needs '{name}', in dollars per million tokens.")
    return Price(**given)  # type: ignore[arg-type]  # checked by Price itself


def _undated(model: str) -> str:
    """`name-2024-07-18` and `name-20240718` without their date."""
    for length, form in ((10, "%Y-%m-%d"), (8, "%Y%m%d")):
        try:
            datetime.datetime.strptime(model[-length:], form)
        except ValueError:
            continue
        return model[: -length - 1]
    return model


def _cap(dollars: float, place: str) -> float:
    if isinstance(dollars, bool) or not isinstance(dollars, (int, float)) or not dollars >= 0:
        raise RecipeError(f"{place}: found {dollars!r}, expected dollars, 0 or more.")
    return math.inf if dollars == math.inf else math.floor(round(dollars * NANO, 3))


def _up(dollars: float) -> int:
    """Nano-dollars, rounded up; what is over by less than a thousandth is a float's own error."""
    return math.ceil(round(dollars * NANO, 3))


def _spent_up(account: _Account, amount: int) -> BudgetError:
    left = (account.cap - account.spent) / NANO
    return BudgetError(
        f"The budget of {account.name} is {account.cap / NANO:.6g} dollars; {account.spent / NANO:.6g} are spent, and "
        f"the next request could cost {amount / NANO:.6g}, more than the {max(0.0, left):.6g} left. What was "
        "answered is kept: raise the budget and run the same command again."
    )
