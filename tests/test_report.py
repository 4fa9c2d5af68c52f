"""The README's figures are those of the recorded results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_recorded_results():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], check=True)
