"""``hpc-bnn report``: one page that needs nothing else."""

import base64
import copy
import functools
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import JOB_SECONDS, WRITE_PLOTS, patience, with_plots
from matplotlib.figure import Figure
from matplotlib.image import imread

from hpc_bnn import write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.run import plots
from hpc_bnn.run.plots import LABELS
from hpc_bnn.run.report import IDEALS, NO_BEST, _best

REPOSITORY = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.titles, self.rows, self._in = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        assert tag not in ("script", "link", "iframe", "object"), tag
        if tag == "tr":
            self.rows.append([])
        self._in = tag

    def handle_data(self, data):
        if self._in == "h2":
            self.titles.append(data)
        if self._in in ("td", "th") and self.rows:
            self.rows[-1].append(data.strip())
        self._in = None

    def row(self, name):
        return next(row for row in self.rows if row and row[0] == name)


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Two runs of classes, one of numbers with three channels, and one that was interrupted."""
    directory, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    common = ["--num_samples", "2", "--num_test_samples", "8", "--test_every_epochs", "1"]
    config = ["train", "--config", str(REPOSITORY / "configs/digits.yaml"), "--data.shards", str(digits)]
    for seed in (0, 1):
        flags = ["--num_epochs", "3", "--seed", str(seed), "--run_dir", str(directory / f"digits{seed}")]
        with with_plots():
            assert main([*config, *common, *flags]) == 0
    x = rng.normal(size=(80, 2))
    y = x @ rng.normal(size=(2, 3)) * [1, 10, 1000] + rng.normal(size=(80, 3))
    facts = {"name": "toy", "source": "test", "licence": "none", "channels": {"y": ["t2m", "z500", "u & v"]}}
    write_shards(directory / "shards", {"train": (x, y), "test": (x[:20], y[:20])}, **facts)
    flags = ["--data.shards", str(directory / "shards"), "--num_epochs", "4", "--run_dir", str(directory / "numbers")]
    with with_plots():
        assert main(["train", *common, *flags]) == 0
    flags = ["--max_seconds", "1e-9", "--run_dir", str(directory / "stopped")]
    assert main([*config, *common, *flags]) == 75
    return directory


def check_page(path):
    page = Page(path.read_text())
    assert page.loads, "a page has pictures"
    for source in page.loads:
        kind, _, content = source.partition(";base64,")
        content = base64.b64decode(content, validate=True)
        if kind == "data:image/svg+xml":
            assert ElementTree.fromstring(content).tag.endswith("svg")
            assert b'href="http' not in content and b"@import" not in content
        else:
            assert kind == "data:image/png" and content.startswith(b"\x89PNG")
    return page


def test_a_run_of_classes(runs, capsys):
    assert main(["report", str(runs / "digits0")]) == 0
    assert str(runs / "digits0" / "report.html") in capsys.readouterr().out
    page = check_page(runs / "digits0" / "report.html")
    assert {"Test metrics", "Training", "Test", "Calibration", "Time and communication", "Examples"} <= set(page.titles)
    assert "What differs" not in page.titles and "Channels" not in page.titles
    summary = json.loads((runs / "digits0" / "summary.json").read_text())
    assert page.row("nll")[1] == f"{summary['test/nll']:.4g}"
    assert page.row("grid (samples x data)")[1] == "1 x 1 ranks"
    assert page.row("tested with")[1].startswith("8 samples, ")


def test_the_posterior_of_a_run(runs, tmp_path):
    """The page shows what evaluation.json has, also in a run that was told not to look."""
    evaluation = json.loads((runs / "digits0/evaluation.json").read_text())
    posterior = evaluation["posterior"]
    assert main(["report", str(runs / "digits0"), "--output", str(tmp_path / "page.html")]) == 0
    page = check_page(tmp_path / "page.html")
    assert {"Posterior", "Signal to noise"} <= set(page.titles)
    accuracies = evaluation["metrics"]["accuracy"], posterior["mean_network"]["accuracy"]
    lines = [row for row in page.rows if row[:1] == ["accuracy"]]
    assert lines[1][1:] == [f"{value:.4g}" for value in accuracies]
    title, columns = page.row("tensor"), posterior["tensors"]
    for number, name in enumerate(columns["name"]):
        line = dict(zip(title, page.row(name), strict=True))
        assert line["weights"] == f"{columns['num_weights'][number]:,}"
        assert line["KL (nats)"] == f"{columns['kl'][number]:.4g}"
        assert line["median"] == f"{columns['snr_median'][number]:.4g}"
    assert f"KL(q || prior) is {posterior['kl']:.6g} nats" in (tmp_path / "page.html").read_text()
    shutil.copytree(runs / "digits0", tmp_path / "without")
    assert main(["evaluate", str(tmp_path / "without"), "--check_up", "false", "--num_test_samples", "2"]) == 0
    assert main(["report", str(tmp_path / "without")]) == 0
    assert not {"Posterior", "Signal to noise"} & set(check_page(tmp_path / "without/report.html").titles)
    sides = [str(tmp_path / "without"), str(runs / "numbers"), str(runs / "digits0")]
    assert main(["report", *sides, "--output", str(tmp_path / "all.html")]) == 0
    assert {"Posterior", "Signal to noise"} <= set(check_page(tmp_path / "all.html").titles)


def test_runs_side_by_side(runs, tmp_path):
    names = [str(runs / name) for name in ("digits0", "digits1", "numbers", "stopped")]
    assert main(["report", *names, "--output", str(tmp_path / "all.html")]) == 0
    assert main(["report", *names, "--output", str(tmp_path / "all.html/page.html")]) == 1
    page = check_page(tmp_path / "all.html")
    assert {"What differs", "By channel", "Channels"} <= set(page.titles)
    assert page.row("--seed")[1:5] == ["0", "1", "0", "0"]
    nll = page.row("nll")
    assert nll[3] != "–" and nll[4] == "–"
    assert page.row("accuracy")[3:5] == ["–", "–"]
    assert page.row("state")[4].startswith("not complete")
    assert page.row("u & v")[0] == "u & v"  # escaped in the file, and read back
    evaluation = json.loads((runs / "numbers" / "evaluation.json").read_text())
    rmse = evaluation["curves"]["channels"]["rmse"]
    header = next(row for row in page.rows if row[:1] == ["name"])
    assert page.row("z500")[header.index("rmse")] == f"{rmse[1]:.4g}"
    text = (tmp_path / "all.html").read_text()
    assert text.count('class="best"') >= 3


def test_each_metric_has_a_direction():
    """The best run of a metric is known for all that a run writes."""
    lower = [
        "nll",
        "brier",
        "ece",
        "adaptive_ece",
        "classwise_ece",
        "aurc",
        "rmse",
        "mae",
        "crps",
        "fair_crps",
        "set_size",
        "calibration_error",
    ]
    named = {*lower, *IDEALS, *NO_BEST}
    assert {name for name in LABELS if not name.startswith("ood_")} == named
    assert _best("mean_iou", [0.5, 0.7]) == _best("spread_skill", [2.0, 1.1]) == _best("nll", [0.5, 0.1]) == {1}


def test_names_cannot_break_the_page_and_the_default_place_is_shared(runs, tmp_path):
    odd = tmp_path / "<script>alert(1)</script>".replace("/", "_")
    shutil.copytree(runs / "digits0", odd)
    shutil.copytree(runs / "digits1", tmp_path / "other")
    with open(odd / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "tra')  # a run that was killed while it wrote
    assert main(["report", str(odd), str(tmp_path / "other")]) == 0
    page = check_page(tmp_path / "report.html")
    assert page.row("epochs, steps")[1].startswith("3,")


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "it holds no run" in capsys.readouterr().err


JUNK = [
    b"",
    b"\0\0",
    b"\xff\xfe",
    b"{",
    b"[]",
    b"3",
    b'"text"',
    b"null",
    b"{}",
    b'{"a": 1}',
    b"[" * 9999,
    b"{[",
    b"\n" * 9,
]
VALUES = [None, "text", [], {}, -1, 1e999, float("nan"), [[]], {"x": None}]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "evaluation.json"])
def test_junk_in_the_files_of_a_run_ends_in_a_message_or_a_page(runs, tmp_path, name, capsys, monkeypatch):
    if name != "metrics.jsonl":  # the figures of the page take long
        monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    directory = tmp_path / "run"
    shutil.copytree(runs / "digits0", directory)
    path = directory / name
    content = path.read_text()
    tree = (
        json.loads(content.splitlines()[-1])
        if name == "metrics.jsonl"
        else json.loads(content)
        if name != "config.yaml"
        else None
    )
    junk = [
        *JUNK,
        *(
            json.dumps(tree | {key: VALUES[n % len(VALUES)]}).encode()
            for n, key in enumerate(tree or ())
            if n % 3 == 0 or name != "metrics.jsonl"
        ),
    ]
    if name == "evaluation.json":
        for part in (("posterior",), *(("posterior", column) for column in ("tensors", "snr", "mean_network"))):
            for number, key in enumerate(functools.reduce(dict.get, part, tree)):
                twin = copy.deepcopy(tree)
                functools.reduce(dict.get, part, twin)[key] = VALUES[number % len(VALUES)]
                junk.append(json.dumps(twin).encode())
    for spoilt in junk:
        path.write_bytes(spoilt)
        code = main(["report", str(directory)])
        said = capsys.readouterr().err
        assert code == 0 or (code == 1 and str(directory) in said and "Traceback" not in said), (spoilt, code, said)
    path.unlink()
    path.mkdir()
    assert main(["report", str(directory)]) == 1 and name in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_it(runs, tmp_path):
    """The browser lays the page out offline, with all of its pictures."""
    path = tmp_path / "report.html"
    assert main(["report", str(runs / "digits0"), str(runs / "numbers"), "--output", str(path)]) == 0
    check = "<script>document.title = [...document.images].map(i => i.naturalWidth > 50).join()</script>"
    probe = tmp_path / "probe.html"
    probe.write_text(path.read_text().replace("</body>", f"{check}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, probe.as_uri()], capture_output=True, text=True, timeout=patience(JOB_SECONDS)
    )
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    num_pictures = len(check_page(path).loads)
    assert title == ",".join(["true"] * num_pictures)


def test_fields_are_shown_as_maps(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for_split = {
        split: tuple(rng.normal(size=(2, n, 2, 9, 12)).astype(np.float32)) for split, n in (("train", 16), ("test", 7))
    }
    write_shards(tmp_path / "shards", for_split, name="fields", source="made here", licence="none")
    drawn = {}
    monkeypatch.setattr(plots, "_plot_fields", lambda examples: drawn.update(examples) or Figure())
    arguments = {"patch": 3, "dim": 8, "depths": [1], "heads": [2], "window": [3, 2], "is_periodic": False}
    flags = ["--model.name", "hpc_bnn.models.Swin", "--model.arguments", json.dumps(arguments), "--num_epochs", "1"]
    flags += ["--data.shards", str(tmp_path / "shards"), "--run_dir", str(tmp_path / "run"), "--num_samples", "2"]
    flags += ["--objective.name", "crps", "--num_test_samples", "3"]
    with with_plots():
        assert main(["train", *flags]) == 0
    assert drawn["y"].shape == drawn["mean"].shape == (3, 9, 12)
    np.testing.assert_allclose(drawn["y"][1], for_split["test"][1][3, 0], atol=1e-5)  # every third
    monkeypatch.undo()
    picture = WRITE_PLOTS(tmp_path / "run", drawn)[1]
    height, width, _ = imread(picture).shape
    assert width > 1.3 * height  # four maps in a row, three examples
