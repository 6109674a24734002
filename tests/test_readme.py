"""The commands of README.md and of docs/first_steps.md run, and what they show is what is there."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, assert_learnt, launch_environment, python, run_job, write_program

README = (REPOSITORY / "README.md").read_text()
FIRST_STEPS = (REPOSITORY / "docs/first_steps.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README + FIRST_STEPS, flags=re.DOTALL)
NOT_RUN = ("make ", "sbatch ", "srun ")
"""Commands that are not run here: the tests themselves, and those that need a Slurm."""


WITH_FEW_EPOCHS = "--run_dir runs/one"
"""Of this run only matters that it ends; that of README trains to its end."""


def test_the_example_of_the_first_steps_is_the_file():
    (shown,) = re.findall(r"```python\n(.*?)```", FIRST_STEPS, flags=re.DOTALL)
    assert shown == (REPOSITORY / "examples/minimal.py").read_text()
    assert len(shown.splitlines()) <= 45 and shown.count("# <--") >= 4


PREAMBLE = """
import os, torch
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
dataset = torch.utils.data.TensorDataset(torch.randn(300, 4), torch.arange(300) % 10)
x_test = torch.randn(5, 4)
torch.manual_seed(int(os.environ["OMPI_COMM_WORLD_RANK"]))
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
"""
EPILOGUE = """
print(f"{step.num_steps} steps, {sum(p.detach().double().norm() for p in net.parameters()):.11f}")
comm.close()
"""


def test_the_readme_is_short_and_its_loop_is_right_as_it_stands_on_any_grid(tmp_path, mpirun):
    """With a network and a data set for those of the user; each rank makes another network, as without a seed."""
    lines = README.splitlines()
    assert len(lines) <= 150 and lines.index("```sh") < 30 and lines.index("```python") < 60
    (loop,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    program, printed = tmp_path / "program.py", set()
    for num_ranks, sample_size in ((1, 1), (2, 1), (2, 2)):
        of_grid = loop.replace("connect(sample_size=1)", f"connect(sample_size={sample_size})")
        program.write_text(PREAMBLE + of_grid + EPILOGUE)
        done = mpirun(num_ranks, program)
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.findall(r"\d+ steps, [\d.]+|tensor\(\[[\d, ]+\]\)", done.stdout)
        assert len(found) == 2 * num_ranks and "60 steps" in done.stdout, done.stdout
        printed |= set(found)
    assert len(printed) == 2, printed


@pytest.fixture(scope="module")
def run_block(tmp_path_factory):
    """Run the commands of a block, once, in the one directory of all blocks; return that directory and how they ended."""
    directory = tmp_path_factory.mktemp("readme")
    for name in ("configs", "data_prep", "tools", "examples"):
        shutil.copytree(REPOSITORY / name, directory / name)
    command, program = shlex.join(python()), shlex.quote(str(Path(sys.executable).with_name("hpc-bnn")))
    write_program(directory / "prepared/python", f'exec {command} "$@"')  # torchrun is that of the environment
    write_program(directory / "prepared/hpc-bnn", f'exec {command} {program} "$@"')
    with (directory / "tools/activate.sh").open("a") as file:
        file.write('PATH="$PWD/prepared:$PATH"\n')

    @functools.cache
    def run(block):
        commands = [line for line in block.splitlines() if line.strip() and not line.startswith(NOT_RUN)]
        commands = [f"{line} --num_epochs 2" if line.endswith(WITH_FEW_EPOCHS) else line for line in commands]
        done = run_job(["sh", "-ec", "\n".join(commands)], 1200, cwd=directory, env=launch_environment())
        return directory, done

    return run


OF_README = [block for block in BLOCKS if block in README]
"""The other ones are slow."""


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=[] if block in OF_README else pytest.mark.slow) for block in BLOCKS],
    ids=[" ".join(block.split())[:50] for block in BLOCKS],
)
def test_commands(block, run_block):
    for line in block.splitlines():
        if line.startswith("make "):
            subprocess.run([*line.split(), "-n"], cwd=REPOSITORY, check=True, capture_output=True)
        if line.startswith("sbatch "):
            subprocess.run(["bash", "-n", line.split()[1]], cwd=REPOSITORY, check=True)
            assert (REPOSITORY / line.split()[2]).exists()
    _, done = run_block(block)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_quickstart_learns(run_block):
    """README's own run on 2 x 2 ranks: accuracy >= 0.97 and NLL <= 0.12 nats on the held-out fifth."""
    (block,) = [block for block in BLOCKS if "runs/digits" in block]
    directory, done = run_block(block)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((directory / "runs/digits/summary.json").read_text())
    assert summary["grid"] == {"world_size": 4, "sample_size": 2, "data_size": 2}
    assert_learnt(summary, "horovod")


def test_the_example_gives_the_same_numbers_on_every_grid(mpirun, run_block):
    """On 1 x 1 and 2 x 2 ranks as the first steps say, and on 3 x 1."""
    (block,) = [block for block in BLOCKS if "examples/minimal.py 2" in block]
    _, shown = run_block(block)
    done = mpirun(3, "examples/minimal.py", 3)
    assert shown.returncode == done.returncode == 0, shown.stderr + done.stderr
    lines = [
        tuple(map(float, numbers))
        for numbers in re.findall(r"negative ELBO ([\d.]+) nats, test accuracy ([\d.]+)", shown.stdout + done.stdout)
    ]
    assert len(lines) == 3
    for nelbo, accuracy in lines[1:]:
        assert (nelbo, accuracy) == lines[0]
    assert lines[0][1] > 0.9


def test_files_that_they_name_exist():
    named = re.findall(r"\b(?:configs|data_prep|docs|examples|jobscripts|tools)/[\w./-]+\w", README + FIRST_STEPS)
    for path in {*named, "CONTRIBUTING.md"}:
        assert (REPOSITORY / path).exists(), path


def test_tests_that_the_cases_name_exist():
    """docs/cases.md: FILE::NAME, and ::NAME of the file before it in the row."""
    rows, num_named = (REPOSITORY / "docs/cases.md").read_text().splitlines(), 0
    for row in rows:
        defined = ""
        for file, name in re.findall(r"(tests/[\w/]+\.py)?(?:::(test_\w+))?", row):
            defined = (REPOSITORY / file).read_text() if file else defined
            num_named += bool(name)
            assert not name or f"def {name}(" in defined, (name, row)
    assert num_named > 120


def test_the_objective_of_the_docs_is_exact_on_every_grid_of_four_ranks(mpirun, tmp_path):
    """docs/objectives.md: the objective and its test, put into one file and run as it says."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/objectives.md").read_text(), flags=re.DOTALL)
    (tmp_path / "test_own.py").write_text("\n".join(blocks))
    for num_ranks in (1, 4):
        done = mpirun(num_ranks, "-m", "pytest", "-q", tmp_path / "test_own.py")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("1 passed") == num_ranks


def test_an_objective_that_raises_on_one_rank_ends_its_test(mpirun, tmp_path):
    (tmp_path / "test_raises.py").write_text(
        "import hpc_bnn\n"
        "from hpc_bnn.testing import objective_is_exact\n"
        "def loss(members, y):\n"
        "    is_uneven = members.shape[1] == 3\n"  # 13 examples on 4 ranks: 4, 3, 3, 3
        "    if is_uneven: raise RuntimeError('deliberate fault')\n"
        "    return (members.mean(0) - y).square().sum(-1)\n"
        "def test_it(objective_is_exact):\n"
        "    objective_is_exact(hpc_bnn.Gathered(loss), lambda f, y: loss(f, y).mean(),\n"
        "                       likelihood=hpc_bnn.Implicit(2), num_samples=(5,))\n"
    )
    done = mpirun(4, "-m", "pytest", "-q", tmp_path)
    assert done.returncode != 0 and "deliberate fault" in done.stderr


def test_the_loop_of_the_docs_gives_the_same_number_on_every_grid(mpirun, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/data.md").read_text(), flags=re.DOTALL)
    sampler, block = sorted(blocks, key=lambda block: "own_shards" in block)
    exec(sampler, {})
    numbers = []
    for num_ranks, sample_size in ((1, 1), (4, 2)):
        program = tmp_path / f"{num_ranks}" / "loop.py"
        program.parent.mkdir()
        program.write_text(block.replace('"own_shards"', repr(str(program.parent / "own_shards"))))
        done = mpirun(num_ranks, program, sample_size)
        assert done.returncode == 0, done.stderr
        numbers.append(re.search(r"x \d.*: ([\d.]+)", done.stdout).group(1))
    assert numbers[0] == numbers[1]
