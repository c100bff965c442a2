"""Write the parts of README.md that follow from stored results: the verdicts, and the table and the figure of the demonstration. `--check` changes nothing and fails if they are out of step."""
import re
import sys
from pathlib import Path

from vitplast.files import replacing
from vitplast.showing import (
    Study, against_accuracy, as_svg, display_frame, findings, summary, text_table,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "nbs" / "results" / "demo"
BLOCK = re.compile(r"(<!-- demo -->\n).*?(<!-- /demo -->)", re.DOTALL)
VERDICTS = re.compile(r"(<!-- verdicts -->\n).*?(<!-- /verdicts -->)", re.DOTALL)


def with_results(text) -> str:
    "README text with the verdicts, and the table and the sentences of the stored demonstration, between their markers."
    verdicts = (ROOT / "nbs/results/headlines/verdicts.md").read_text(encoding="utf-8").replace("](experiments/", "](nbs/experiments/")
    text = VERDICTS.sub(lambda m: m[1] + verdicts + m[2], text)
    stored = Study.load(RESULTS)
    shown = display_frame(stored).drop(columns=["embedding", "parameters", "rate"])
    sentences = "\n".join(f"- {line}" for line in findings(stored)[2:])
    return BLOCK.sub(lambda m: f"{m[1]}```\n{text_table(shown)}\n```\n\n{sentences}\n{m[2]}", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit("README.md is out of step with nbs/results: run `make readme`" if with_results(text) != text else 0)
    with replacing(readme) as file:
        file.write_text(with_results(text), encoding="utf-8")
    with replacing(RESULTS / "accuracy.svg") as file:
        file.write_text(as_svg(against_accuracy(summary(Study.load(RESULTS)))) + "\n", encoding="utf-8")
