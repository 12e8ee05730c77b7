"""Take docs/pictures/report.png: the top of a finished run's report, as chromium shows it.

python scripts/report_picture.py runs/quickstart
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "pictures" / "report.png"
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    report = (Path(sys.argv[1]) / "report.html").resolve()
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *QUIET, f"--user-data-dir={profile}", "--window-size=1120,1480", "--hide-scrollbars"]
        subprocess.run([*command, f"--screenshot={TARGET}", report.as_uri()], check=True, capture_output=True)
    print(f"took {TARGET}")


if __name__ == "__main__":
    main()
