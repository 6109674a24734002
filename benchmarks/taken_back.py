#!/usr/bin/env python3
"""Take mends of docs/cases.md back, one at a time: the test that holds each must fail.

    python benchmarks/taken_back.py [--only weight_decay ...] [--list]

Each mend is one replacement in a copy of the repository, whose test then runs there, on ranks by mpirun. A test that passes
without its mend, and a text that is no longer there once, are said at the end, with code 1. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mend(NamedTuple):
    """A mend, and how it is taken back."""

    cases: str
    """As docs/cases.md calls them."""
    file: str
    old: str
    test: str
    """FILE -k EXPRESSION; in tests/mpi it runs on ``ranks``."""
    new: str = "if False:"
    """In the place of ``old``; by default the condition of what holds the mend."""
    ranks: int = 0
    also: tuple[str, str] | None = None
    """A second replacement, where two mechanisms hold a mend."""


NETWORK, LOOK, UPDATERS = (
    f"hpc_bnn/{path}.py" for path in ("posteriors/network", "posteriors/look", "training/updaters")
)
FILES, STEP, CHECKPOINT = (f"hpc_bnn/{path}.py" for path in ("data/files", "training/step", "run/checkpoint"))
NET, AFTER, EQUALITY = "test_network.py -k ", "test_after_wrap.py -k ", "hpc_bnn/training/equality.py"
MENDS = {
    "change in place": Mend(
        "8", LOOK, "return (not clone.is_inference() and clone._version > 0) or not is_alike(clone, original, 0.0)",
        NET + "changed_in_place_is_copied", new="return False",
    ),
    "DataParallel by name": Mend(
        "11", "hpc_bnn/posteriors/select.py", '        if found:\n            rule = "it spreads',
        "test_weights.py -k sums_gradients_is_refused", new='        if False:\n            rule = "it spreads',
    ),
    "one value per channel": Mend(
        "10", "hpc_bnn/posteriors/batch_norm.py", "and count <= 1:",
        "test_families.py -k one_value_per_channel", new="and count <= 0:",
    ),
    "targets of a step": Mend(
        "12, 28", "hpc_bnn/training/data_term.py", "misfits = ~self._likelihood.fits(y)",
        "test_evaluate.py -k targets_are_checked", new="misfits = ~self._likelihood.fits(y) & False",
    ),
    "targets of an evaluation": Mend(
        "12, 28", "hpc_bnn/predictive/evaluation.py", "misfits = ~likelihood.fits(block.y)",
        "test_evaluate.py -k that_nothing_has", new="misfits = ~likelihood.fits(block.y) & False",
    ),
    "cache of casts": Mend(
        "40", NETWORK, "cache_enabled=False)",
        NET + "users_autocast", new="cache_enabled=True)", also=("        torch.clear_autocast_cache()  # the casts of the former weights\n", ""),
    ),
    "moved after the wrap": Mend(
        "42", NETWORK, "if (parameter.dtype, parameter.device) != (view.dtype, view.device):",
        AFTER + "what_cannot_be_followed",
    ),
    "new head": Mend(
        "43", NETWORK, "if parameter.requires_grad and id(parameter) not in trainable:",
        AFTER + "what_cannot_be_followed",
    ),
    "frozen after the wrap": Mend(
        "4 of 24.3", NETWORK, "if not all([p.requires_grad for p in self.parameters.values()]):",
        AFTER + "what_cannot_be_followed",
    ),
    "weight decay": Mend(
        "44", UPDATERS, 'is_decay = ("weight_decay" in key or key == "lambd") and not isinstance(value, bool) and value',
        NET + "weight_decay_on_weights_with_a_prior", new="is_decay = False",
    ),
    "ascent": Mend(
        "44", UPDATERS, 'if group.get("maximize"):',
        NET + "cannot_train_the_posterior",
    ),
    "closure": Mend(
        "29", UPDATERS, "if closure is not None and closure.default is inspect.Parameter.empty:",
        AFTER + "wants_a_closure",
    ),
    "optimizer of the network": Mend(
        "B2", UPDATERS, "if of_network or not ours & updated:",
        NET + "cannot_train_the_posterior",
    ),
    "no gradients": Mend(
        "45", STEP, "if not torch.is_grad_enabled():",
        NET + "without_gradients",
    ),
    "tables of weights": Mend(
        "46", NETWORK, "derived = [layer for layer in self._deriving if not layer.training]",
        NET + "table_derived", new="derived = []",
    ),
    "batch against walk": Mend(
        "51", "hpc_bnn/training/batch_trial.py", "        if problem is not None:\n            self._loop.fall_back",
        NET + "gives_another_gradient_walks", new="        if False:\n            self._loop.fall_back",
    ),
    "flags win": Mend(
        "B5", "hpc_bnn/cli/commands.py", "return [words[0], *files, *flags, *run_dirs]",
        "test_cli.py -k flag_wins", new="return list(words)",
    ),
    "bytes of an example": Mend(
        "F11", FILES, "if is_changed.any():",
        "test_data.py -k every_flipped_byte",
    ),
    "links of HDF5": Mend(
        "F11", FILES, "if not isinstance(file.get(name, getlink=True), h5py.HardLink):",
        "test_data.py -k lie_elsewhere",
    ),
    "external storage": Mend(
        "F11", FILES, "if dataset.external or dataset.is_virtual:",
        "test_data.py -k lie_elsewhere",
    ),
    "plain names": Mend(
        "F4", "hpc_bnn/data/manifest.py", "are_plain = all(isinstance(file, str) and SHARD.fullmatch(file) for file in files)",
        "test_data.py -k plain_name", new="are_plain = True",
    ),
    "half a row": Mend(
        "F8", "hpc_bnn/safe_files/__init__.py", 'if length and os.pread(descriptor, 1, length - 1) != b"\\n":',
        "test_safe_files.py -k half_a_row",
    ),
    "bytes of a note": Mend(
        "F14", CHECKPOINT, "if digest is not None and digest != _digest_of(content):",
        "test_checkpoint.py -k every_bit_of_a_note",
    ),
    "bytes of a checkpoint": Mend(
        "F6", CHECKPOINT, "if len(content) != note.num_bytes or hashlib.sha256(content).hexdigest() != note.sha256:",
        "test_checkpoint.py -k damaged_checkpoint_is_used",
    ),
    "metric that is no number": Mend(
        "F21", CHECKPOINT, "metric = metric if metric is not None and math.isfinite(metric) else None",
        "test_checkpoint.py -k newest_and_the_best", new="metric = metric",
    ),
    "sum of the batch": Mend(
        "B3, F18", EQUALITY, "if is_equal and tally[Tally.NUM_EXAMPLES] == self._global_batch_size and",
        "mpi/test_equality.py -k wrong_global_batch_size", new="if is_equal and", ranks=2,
    ),
    "settings of ranks": Mend(
        "F3", EQUALITY, "any(tally[Tally.SETTINGS :])",
        "mpi/test_equality.py -k other_settings", new="any(tally[Tally.BATCH :])", ranks=2,
    ),
    "examples of a sample group": Mend(
        "B1", EQUALITY, "any(tally[Tally.SETTINGS :])",
        "mpi/test_equality.py -k other_examples", new="any([tally[Tally.SETTINGS], tally[Tally.PARAMETERS]])", ranks=2,
    ),
    "replicas after the first step": Mend(
        "B1", EQUALITY, "any(tally[Tally.SETTINGS :])",
        "mpi/test_equality.py -k after_the_first_step", new="any(tally[Tally.SETTINGS : Tally.PARAMETERS])", ranks=2,
    ),
    "replicas": Mend(
        "B1", EQUALITY, "if not torch.equal(first, piece):",
        "mpi/test_equality.py -k replicas_that_differ", ranks=2,
    ),
}  # fmt: skip


def fails_without(mend: Mend, copy: Path) -> tuple[bool | None, str]:
    """Return whether the test fails, None where the mend is not there to be taken back, and its last line."""
    path = copy / mend.file
    text = changed = path.read_text(encoding="utf-8")
    if text.count(mend.old) != 1:
        return None, f"the text is there {text.count(mend.old)} times"
    files, _, selection = mend.test.partition(" -k ")
    command = [sys.executable]
    if mend.ranks:
        command = ["mpirun", "-np", str(mend.ranks), *command, "-m", "mpi4py", "tests/mpi/run.py"]
        selection = f"{Path(files).stem} and {selection}"
    else:
        command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{name}" for name in files.split())]
    environment = os.environ | {"PYTHONPATH": str(copy), "TEST_LIBRARY": "mpi", "OMP_NUM_THREADS": "1"}
    for old, new in ((mend.old, mend.new), mend.also or ("", "")):
        changed = changed.replace(old, new) if old else changed
    path.write_text(changed, encoding="utf-8")
    try:
        done = subprocess.run([*command, "-k", selection], cwd=copy, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    last = next((line for line in reversed(done.stdout.splitlines()) if "failed" in line or "passed" in line), "")
    return done.returncode != 0 and " failed" in last, last.strip("= ") or done.stderr[-200:]


def main(options: argparse.Namespace) -> int:
    """Take back what is asked for; 0 where each test failed."""
    chosen = {name: mend for name, mend in MENDS.items() if not options.only or name in options.only}
    if options.list:
        print("\n".join(chosen))
        return 0
    wrong = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "main"
        for part in ("hpc_bnn", "tests", "configs", "data_prep", "examples", "tools", "docs", "jobscripts"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (*ROOT.glob("*.md"), ROOT / "setup.cfg"):
            shutil.copy(file, copy)
        print("| taken back | case | test | outcome | seconds |\n|---|---|---|---|---:|")
        for name, mend in chosen.items():
            start = time.monotonic()
            failed, last = fails_without(mend, copy)
            print(f"| {name} | {mend.cases} | {mend.test} | {last} | {time.monotonic() - start:.0f} |", flush=True)
            if not failed:
                wrong.append(name)
    print(
        f"\n{len(chosen) - len(wrong)} of {len(chosen)} tests failed without their mend"
        + "".join(f"; not: {n}" for n in wrong)
    )
    return bool(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=list(MENDS), metavar="MEND")
    parser.add_argument("--list", action="store_true", help="the mends")
    sys.exit(main(parser.parse_args()))
