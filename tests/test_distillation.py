"""The distillation example learns from a few classes of a teacher, builds no logits, and keeps what it says."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import distillation
import jax
import jax.numpy as jnp
import language_model
import optax

from programs import avals

pytestmark = pytest.mark.usefixtures("as_users_run")

V, B, T, D = 1000, 4, 32, 32
SMALL = [f"--vocabulary={V}", f"--batch={B}", f"--length={T}", f"--features={D}", "--files=40"]


@pytest.mark.exhaustive
def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distillation, "VALIDATION_BATCHES", 4)
    monkeypatch.setattr(distillation, "EVALUATIONS", 3)
    out = tmp_path / "distillation.png"
    steps = ["--teacher-steps", "60", "--steps", "30", "--temperature", "1.5"]
    found = distillation.main([*SMALL, *steps, "--out", str(out), "--cache", str(tmp_path)])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["bytes"] == 4 * distillation.K
    assert found["difference"] < 1e-4
    results = found["results"]
    assert list(results) == ["teacher", *distillation.STUDENTS, distillation.BUILT]
    text = capsys.readouterr().out
    for name, result in results.items():
        assert f"\n{name} " in text
        assert result["seconds"] > 0
    for name in distillation.STUDENTS:
        first, *_, last = results[name]["validation"][:, 1]
        assert first == pytest.approx(np.log(V), abs=0.1)
        assert last == results[name]["loss"] < 0.9 * first
        assert 0 < results[name]["kl"] < 0.5 * first
    for claim in ("64 bytes per token", "Best student: ", "Worse than labels alone: ", f"drawn in {out}"):
        assert claim in text


@pytest.fixture
def kept(as_users_run):
    """A teacher that is sure of some tokens, and a batch with what is kept of it."""
    teacher = language_model.init(jax.random.key(0), V, D)
    batch = next(language_model.batches(np.arange(B * T + 1), np.zeros(B * T + 1, int), V, B, T))
    of_rows = language_model.hidden(teacher, batch["tokens"], batch["segments"]).reshape(B * T, D)
    teacher["kernel"] = teacher["kernel"].at[:, 7].set(of_rows[5]) * 20
    return teacher, batch | jax.device_get(
        jax.jit(partial(distillation.top, temperature=2.0))(teacher, batch)
    )


def test_what_is_kept(kept):
    teacher, batch = kept
    p = np.asarray(jax.nn.softmax(distillation.layer_of(teacher, batch).dense() / 2), float)  # [N, V]
    assert batch["classes"].nbytes + batch["probs"].nbytes == 64 * B * T
    best = np.take_along_axis(p, batch["classes"].astype(int), -1)  # [N, K]
    np.testing.assert_allclose(best, np.sort(p)[:, : -distillation.K - 1 : -1], rtol=1e-3)
    np.testing.assert_allclose(batch["probs"], best, rtol=3e-3, atol=1e-7)
    mass = batch["probs"].astype(float).sum(-1)  # [N]
    assert p.max() > 1 - 1e-6  # a sure one leaves next to nothing, but the bucket is not empty
    assert 0.5 < mass.max() <= 1 - 2**-12
    assert (batch["probs"] == 0).any()
    losses = [distillation.objective(name, teacher, None, batch, 2.0) for name in distillation.KEPT]
    assert np.isfinite(losses).all()


def test_divergences_are_those_of_all_logits(kept):
    _, batch = kept
    student = language_model.init(jax.random.key(1), V, D // 4, 16)
    assert distillation.check(student, batch, 2.0) < 1e-5
    forward = distillation.objective("top 16, KL", student, None, batch, 2.0)
    plain = distillation.plain(student, batch, 2.0, 0.0)
    np.testing.assert_allclose(forward, plain, rtol=1e-5)
    labels = distillation.objective(distillation.LABELS, student, None, batch, 2.0)
    both = distillation.objective("labels + top 16, KL", student, None, batch, 2.0)
    np.testing.assert_allclose(both, labels / 2 + 2 * plain, rtol=1e-5)  # T^2 = 4


@pytest.fixture(scope="module")
def arguments():
    """Shapes of a larger problem: a student, a teacher, a batch."""
    vocabulary, rows, length = 16_384, 8, 64
    student, teacher = (
        jax.eval_shape(partial(language_model.init, vocabulary=vocabulary, features=d), jax.random.key(0))
        for d in (16, 64)
    )
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "mask": bool}
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in dtypes.items()}
    of_kept = {"classes": jnp.uint16, "probs": jnp.float16}
    shape = rows * length, distillation.K
    return student, teacher, batch | {name: jax.ShapeDtypeStruct(shape, x) for name, x in of_kept.items()}


@pytest.mark.parametrize("name", distillation.STUDENTS)
def test_no_logits_are_built(name, arguments):
    step = jax.value_and_grad(partial(distillation.objective, name))
    logits = 512 * 16_384
    sizes = [np.prod(x.shape) for x in avals(jax.make_jaxpr(step)(*arguments).jaxpr) if hasattr(x, "shape")]
    assert max(sizes) < logits
    dense = jax.value_and_grad(partial(distillation.objective, distillation.WHOLE, dense=True))
    assert any(
        x.shape == (512, 16_384)
        for x in avals(jax.make_jaxpr(dense)(*arguments).jaxpr)
        if hasattr(x, "shape")
    )


def test_memory(arguments):
    student, teacher, batch = arguments
    optimizer = optax.adam(1e-2)

    def temporaries(name, **options):
        init = jax.eval_shape(optimizer.init, student)
        fixed = optax.GradientTransformation(lambda _: init, optimizer.update)
        step = distillation.compiled_step(name, fixed, student, teacher, batch, **options)
        return step.memory_analysis().temp_size_in_bytes

    logits = 4 * 512 * 16_384
    built = temporaries(distillation.WHOLE, dense=True)
    assert built > 2 * logits
    for name in (distillation.WHOLE, "labels + top 16, KL"):
        assert temporaries(name) < logits / 2 < built / 4
