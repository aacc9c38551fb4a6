#!/usr/bin/env bash
# reasoning-gym 0.1.25: several tasks' `score_answer` give a full or nearly full score to text that answers nothing.
#
# A data set's scorer looks like a verifier, so one expects 1.0 for the gold answer alone. Seen on 100 items each (seed 1):
#   coin_flip           the text `0` scores 1.0 on 96 items: any prefix of the gold answer does
#   complex_arithmetic  the text `nan` scores 1.0 on all
#   gsm_symbolic        the gold number, a line break and another number scores 1.0 on all
# Whoever trains with reinforcement from these scores, or reports them, rewards such text.
# Output seen: full scores of 100 wrong answers: {'coin_flip': 96, 'complex_arithmetic': 100, 'gsm_symbolic': 100}
# Exits 0 while this holds, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25

"$folder/venv/bin/python" - <<'PYTHON'
import reasoning_gym


def full_marks(task: str, answer_to) -> int:
    """Of 100 items, how many give `answer_to(gold)` a score of 1.0."""
    items = reasoning_gym.create_dataset(task, size=100, seed=1)
    return sum(items.score_answer(answer_to(item["answer"]), item) == 1.0 for item in items)


counts = {
    "coin_flip": full_marks("coin_flip", lambda gold: "0"),
    "complex_arithmetic": full_marks("complex_arithmetic", lambda gold: "nan"),
    "gsm_symbolic": full_marks("gsm_symbolic", lambda gold: f"{gold}\n{int(gold) + 1}"),
}
print("full scores of 100 wrong answers:", counts)
raise SystemExit(0 if all(count >= 80 for count in counts.values()) else 1)
PYTHON
