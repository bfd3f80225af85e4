"""The demo: its gradients, its states, its baselines, its command."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import log2

import numpy as np
import pytest

from hla.cli import main
from hla.demo import COMPOSED, ROWS, planned
from hla.demo.composition import Chains
from hla.demo.corpus import WINDOW, Corpus, gzip_bits, order2_bits
from hla.demo.model import (
    NO_MIXER,
    SOFTMAX,
    TAPS,
    Config,
    initialise,
    loss_and_gradients,
    predict,
)
from hla.demo.training import (
    Job,
    Trained,
    generate,
    interrupts_held,
    score,
    train,
    train_all,
)
from hla.machine import source

MIXERS = [name for name in ROWS if name != NO_MIXER]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def tiny(operator, dtype="float64"):
    config = Config(operator, blocks=2, heads=2, width=16, hidden=12)
    return config, initialise(config, 3, dtype)


def corpus(text, held):
    array = np.frombuffer(text, np.uint8)
    return Corpus("text", array[:-held], array[-held:])


def bare(job):
    return train(job, lambda job, step, bits: None)


def silent(job, step, bits):
    """Report nothing."""


# The model


@pytest.mark.parametrize("operator", [*ROWS, SOFTMAX])
def test_gradients_of_the_whole_model_equal_finite_differences(operator, rng):
    config, parameters = tiny(operator)
    tokens, targets = rng.integers(0, 256, (2, 2, 70))
    targets[0, :30] = -1
    _, gradients = loss_and_gradients(parameters, config, tokens, targets)
    assert gradients.keys() == parameters.keys()
    for name, x in parameters.items():
        direction = rng.standard_normal(x.shape)
        ends = [
            loss_and_gradients(parameters | {name: x + h * direction}, config, tokens, targets)[0]
            for h in (1e-6, -1e-6)
        ]
        expected = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradients[name] * direction), expected, rtol=2e-5)


@pytest.mark.parametrize("operator", ROWS)
def test_float32_stays_float32(operator, rng):
    config, parameters = tiny(operator, "float32")
    tokens = rng.integers(0, 256, (2, 9))
    _, gradients = loss_and_gradients(parameters, config, tokens, tokens)
    logits, _ = predict(parameters, config, tokens)
    assert {x.dtype for x in (logits, *gradients.values())} == {np.dtype("float32")}


def test_the_models_differ_in_their_operator_only():
    first, *others = (initialise(Config(operator), 0) for operator in ROWS)
    for other in others:
        assert other.keys() == first.keys()
        assert all(np.array_equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("operator", ROWS)
def test_steps_from_the_state_of_a_scan_give_the_logits_of_the_whole_scan(operator, rng):
    config, parameters = tiny(operator)
    tokens = rng.integers(0, 256, (2, 100))
    whole, _ = predict(parameters, config, tokens)
    logits, states = predict(parameters, config, tokens[:, :70])
    seen = [logits]
    for token in tokens.T[70:]:
        logits, states = predict(parameters, config, token, states)
        seen.append(logits[:, None])
    np.testing.assert_allclose(np.concatenate(seen, axis=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", ROWS)
def test_a_byte_is_seen_after_it_only_and_only_through_mixer_and_convolution(operator, rng):
    config, parameters = tiny(operator)
    tokens = rng.integers(0, 256, (1, 30))
    other = tokens.copy()
    other[0, 10] ^= 1
    before, after = (predict(parameters, config, x)[0][0] for x in (tokens, other))
    assert np.array_equal(before[:10], after[:10])
    assert not np.array_equal(before[10], after[10])
    past = 10 + config.blocks * (TAPS - 1)
    assert not np.array_equal(before[past], after[past])
    assert np.array_equal(before[past + 1 :], after[past + 1 :]) == (operator == NO_MIXER)


# Training and scores


def test_same_seed_same_model_and_curve(rng):
    text = corpus(rng.integers(0, 40, 5000, dtype=np.uint8).tobytes(), 500)
    config = Config("hla2", width=16, hidden=16)
    a, b, c = (bare(Job(config, text, 3, seed)) for seed in (1, 1, 2))
    assert (a.losses, a.scores) == (b.losses, b.scores)
    assert all(np.array_equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    assert a.losses != c.losses


def test_a_mixer_learns_what_the_convolution_does_not_tell(rng):
    """A letter comes again after four dots, which are all that a convolution sees."""
    letters = (b"abcd"[i : i + 1] for i in rng.integers(0, 4, 2500))
    text = b"".join(x + b"...." + x for x in letters)
    config = Config(NO_MIXER, blocks=1, width=32, decays=(0.9, 0.99), rate=1e-2)
    jobs = [
        Job(replace(config, operator=operator), corpus(text, 1000), 240, 0)
        for operator in ("linear", NO_MIXER)
    ]
    mixer, none = train_all(jobs, silent)
    assert mixer.score < 0.7 * none.score < 0.1 * none.losses[0]


def test_chains_are_facts_in_the_order_that_ahla_composes(rng):
    chains = Chains(3, 16)
    tokens, wanted = chains.draw(rng, 50)
    assert tokens.shape == wanted.shape == (50, 24)
    for row, answers in zip(tokens, wanted, strict=True):
        assert not row[2:18:3].any()
        assert not row[19::2].any()
        late, early = (dict(row[i : i + 9].reshape(3, 3)[:, :2].tolist()) for i in (0, 9))
        assert len({*late, *early, *late.values(), *early.values()}) == 9
        assert [late[early[a]] for a in row[18::2].tolist()] == answers[18::2].tolist()
        assert set(answers[:18]) | set(answers[19::2]) == {-1}


def test_ahla_composes_and_first_order_does_not():
    """As the demo trains them; how soon ahla finds the way depends on a processor's roundings."""
    ahla, linear = bare(composing("ahla")), bare(composing("linear")._replace(steps=500))
    assert ahla.score > 0.9
    assert linear.score < 0.5


def composing(operator):
    """The demo's own job."""
    asked = argparse.Namespace(operator=[operator], steps=None, quick=False, seed=0)
    return planned(asked, corpus(bytes(5000), 500))[0]


def test_score_does_not_depend_on_how_the_text_is_cut(monkeypatch, rng):
    config, parameters = tiny("hla3")
    held = rng.integers(0, 256, 401, dtype=np.uint8)
    whole = score(parameters, config, held)
    monkeypatch.setattr("hla.demo.training.PIECE", 64)
    np.testing.assert_allclose(score(parameters, config, held), whole, rtol=1e-9)


@pytest.mark.parametrize("operator", ROWS)
def test_generation_is_reproducible_and_agrees_with_the_scan(operator, rng):
    config, parameters = tiny(operator, "float32")
    model = Trained(Job(config, Chains(), 0, 0), parameters, [], [], 0.0)
    prompt = rng.integers(0, 256, 50, dtype=np.uint8)
    first, again, other = (generate(model, prompt, 30, seed) for seed in (0, 0, 1))
    assert first.difference < 1e-4
    assert len(first.text) == 30
    assert first.text == again.text != other.text


def test_a_process_that_fails_is_reported():
    job = Job(Config("nonsense"), corpus(bytes(5000), 500), 2, 0)
    with pytest.raises(RuntimeError, match="training nonsense ended with exit code 1"):
        train_all([job], silent)


# Baselines


def test_order_2_counts_equal_their_definition(rng):
    text = rng.choice(np.frombuffer(b"abcd", np.uint8), 400, p=(0.5, 0.3, 0.15, 0.05))
    train_, held = bytes(text[:300]), bytes(text[300:-1]) + b"z"
    bits = 0.0
    for t, byte in enumerate(held):
        past, p = (train_ + held[:t])[-2:], 1 / 256
        for order in range(3):
            context = past[2 - order :]
            after = Counter(
                train_[i + order]
                for i in range(len(train_) - order)
                if train_[i : i + order] == context
            )
            if after:
                p = (after[byte] + len(after) * p) / (after.total() + len(after))
        bits -= log2(p) / len(held)
    assert order2_bits(corpus(train_ + held, len(held))) == pytest.approx(bits, rel=1e-12)


def test_gzip_knows_the_training_text(rng):
    noise = rng.integers(0, 256, 6000, dtype=np.uint8).tobytes()
    assert 7.9 < gzip_bits(corpus(noise, 1000)) < 8.2
    assert gzip_bits(corpus(noise + noise[-1000:], 1000)) < 1


# The command


def test_quick_run_from_end_to_end(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path / "new" / "out")]) == 0
    out = capsys.readouterr().out
    for row in ("gzip", "order-2", "no mixer", "softmax attention", *MIXERS):
        assert row in out
    folder = tmp_path / "new" / "out"
    assert sorted(x.name for x in folder.iterdir()) == ["curves.png", "results.json"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["command"] == "hla demo --quick"
    assert {"python", "hla", "numpy"} <= set(results["versions"])
    assert {"processor", "cores", "load"} <= set(results["machine"])
    assert {"date", "commit"} <= set(results)
    assert results["seconds"] > 0
    assert source("demo", results).encode() in (folder / "curves.png").read_bytes()
    assert tuple(results["models"]) == ROWS
    assert len({x["parameters"] for x in results["models"].values()}) == 1
    assert [x["operator"] for x in results["composition"]] == list(COMPOSED)
    for row in results["models"].values():
        assert 0 < row["bits_per_byte"] < 9
        assert row["bits_per_byte"] == row["held_out"][-1][1]


def test_own_binary_text_one_operator_given_steps(tmp_path, capsys, rng):
    path = tmp_path / "data.bin"
    path.write_bytes(rng.integers(0, 256, 6000, dtype=np.uint8).tobytes())
    words = ["demo", "--text", str(path), "--operator", "ahla", "--steps", "3", "--quick"]
    assert main([*words, "--commit", "abc", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["commit"] == "abc"
    assert results["command"] == (
        f"hla demo --operator ahla --steps 3 --text {shlex.quote(str(path))} --quick"
    )
    assert list(results["models"]) == ["ahla"]
    assert len(results["models"]["ahla"]["training"]) == 3
    shown = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in shown)


BAD = {
    "missing": "cannot read .*: No such file",
    "folder": "cannot read .*: Is a directory",
    "empty": "has 0 bytes; expected at least",
    "short": "has 11 bytes; expected at least",
}


def test_the_text_says_which_operator_was_ahead():
    """First order or another, beside the model that has no operator."""
    from hla.demo import report

    text = corpus(bytes(WINDOW * 40), WINDOW)
    scores = {NO_MIXER: 2.5, "linear": 2.0, "hla2": 2.1, "hla3": 2.2}

    def said(**scores):
        models = [
            Trained(Job(Config(name), text, 1, 0), {}, [], [(1, bits)], 1.0)
            for name, bits in scores.items()
        ]
        return report.text_shows(report.Results(models, [], {}, None, {}))

    first = said(**scores)
    assert first.endswith(
        "Of the operators first order is ahead, by one model of each"
        " (linear 2.000, hla2 2.100, no mixer 2.500)."
    )
    ahead = said(**scores | {"hla3": 1.5})
    assert "hla3 is ahead, by one model of each (linear 2.000, hla3 1.500, no mixer 2.500)" in ahead
    assert "Of the operators" not in said(linear=2.0)


@pytest.mark.parametrize(("case", "message"), BAD.items(), ids=list(BAD))
def test_bad_text_is_one_line_and_writes_nothing(case, message, tmp_path, capfd):
    path = tmp_path / "text"
    if case == "folder":
        path.mkdir()
    elif case != "missing":
        path.write_bytes(b"" if case == "empty" else b"hello world")
    out = tmp_path / "out"
    assert main(["demo", "--text", str(path), "--out", str(out)]) == 2
    shown, error = capfd.readouterr()
    assert shown == ""
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not out.exists()


def test_the_shortest_text_is_long_enough(tmp_path):
    assert WINDOW < 0.9 * 4096
    (tmp_path / "text").write_bytes(bytes(4096))
    assert len(Corpus.read(tmp_path / "text").held) == 409


def test_out_that_is_a_file_is_refused_before_any_work(tmp_path, capfd):
    (tmp_path / "out").write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 2
    shown, error = capfd.readouterr()
    assert shown == ""
    assert error == f"hla demo: cannot write to {tmp_path / 'out'}: File exists\n"
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["curves.png", "results.json"])
def test_a_file_that_cannot_be_replaced_is_refused_before_any_work(name, tmp_path, capfd):
    (tmp_path / name).mkdir()
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    shown, error = capfd.readouterr()
    assert shown == ""
    assert error == f"hla demo: cannot write to {tmp_path / name}: not a regular file\n"


WORDS = ("demo", "--quick", "--steps", "1", "--operator", "none")


def lost(how):
    """A standard output that loses what is printed."""
    if how == "narrow":
        return io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if how == "full":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(("how", "code"), [("narrow", 0), ("closed", 0), ("full", 1)])
def test_what_was_trained_is_saved_whatever_becomes_of_the_output(how, code, tmp_path, monkeypatch):
    if how == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with lost(how) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([*WORDS, "--out", str(tmp_path)]) == code
    assert sorted(x.name for x in tmp_path.iterdir()) == ["curves.png", "results.json"]


def test_what_cannot_be_saved_in_the_end_is_printed_all_the_same(tmp_path, monkeypatch, capsys):
    def train_all(jobs, report):
        (tmp_path / "results.json").mkdir()
        return [bare(job) for job in jobs]

    monkeypatch.setattr("hla.demo.train_all", train_all)
    assert main([*WORDS, "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "no mixer continues" in out
    assert f"Saved: {tmp_path / 'curves.png'}\n" in out
    assert err.startswith(f"cannot write {tmp_path / 'results.json'}: ")


def test_a_process_that_fails_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys):
    def train_all(jobs, report):
        raise RuntimeError("training hla3 ended with exit code -9")

    monkeypatch.setattr("hla.demo.train_all", train_all)
    assert main([*WORDS, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "hla demo: training hla3 ended with exit code -9\n"
    assert list(tmp_path.iterdir()) == []


def test_processes_do_not_hear_an_interrupt_and_the_parent_hears_it_after_their_start():
    inside = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        child = subprocess.Popen(["sleep", "60"])
        child.send_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        inside.append("to the end")
    child.terminate()
    assert child.wait() == -signal.SIGTERM
    assert inside == ["to the end"]


def test_without_the_extra_it_names_the_remedy(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr("hla.demo.find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install ".[demo]"' in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["--steps", "0"], ["--seed", "-1"], ["--seed", "x"], ["--operator", "softmax"]]
)
def test_bad_options_are_refused(words):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *words])
    assert stop.value.code == 2
