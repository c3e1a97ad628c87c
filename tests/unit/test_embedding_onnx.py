"""The bundled models: their recipes, their files, and what the settings get wrong."""

import asyncio
import gc
import weakref
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from infra.embedding.factory import open_embedder
from infra.embedding.onnx import RECIPES, OnnxEmbedder, load_tokenizer
from infra.settings import EmbeddingSettings, Settings


@pytest.fixture(params=list(RECIPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings(**changes: object) -> EmbeddingSettings:
    return EmbeddingSettings.model_validate({**Settings().embedding.model_dump(), **changes})


def test_missing_files_are_named_with_the_setting(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"model\.onnx is missing: set embedding\.models_path"):
        open_embedder(settings(provider="onnx", model="bge-small-en-v1.5", models_path=tmp_path))


def test_an_unknown_model_is_reported_which_there_are(tmp_path: Path):
    with pytest.raises(ValueError, match=r"bundled models are .*bge-small"):
        open_embedder(settings(provider="onnx", model="word2vec", models_path=tmp_path))


def test_bedrock_takes_one_model():
    with pytest.raises(ValueError, match="titan"):
        open_embedder(settings(provider="bedrock", model="bge-small-en-v1.5", region="us-east-1"))


def test_another_dimension_is_refused(name: str):
    with pytest.raises(ValueError, match=r"embedding\.dimension is 512, but .* has 384"):
        open_embedder(settings(provider="onnx", model=name, dimension=512))


async def test_settings_open_a_working_embedder(name: str):
    embedder = open_embedder(settings(provider="onnx", model=name))
    assert (await embedder.embed_passages(["one", "two"])).shape == (2, 384)
    await embedder.close()


async def test_a_closed_embedder_frees_the_weights(name: str):
    embedder = OnnxEmbedder(Settings().embedding.models_path, name, threads=1)
    weights = weakref.ref(embedder._session)
    await embedder.close()
    gc.collect()
    assert weights() is None


async def test_only_questions_carry_the_prefix(name: str):
    embedder = OnnxEmbedder(Settings().embedding.models_path, name, threads=1)
    prefixed = (await embedder.embed_passages([RECIPES[name].query_prefix + "why is the sky blue"]))[0]
    assert np.array_equal(await embedder.embed_query("why is the sky blue"), prefixed)
    await embedder.close()


async def test_text_is_cut_at_the_models_own_limit(name: str):
    limit = RECIPES[name].max_tokens - 2  # the two special tokens
    embedder = OnnxEmbedder(Settings().embedding.models_path, name, threads=1)
    full, more, less = await embedder.embed_passages(
        [" ".join(["day"] * limit), " ".join(["day"] * limit + ["night"]), " ".join(["day"] * (limit - 1) + ["night"])]
    )
    assert np.array_equal(full, more)
    assert not np.array_equal(full, less)
    await embedder.close()


def test_the_tokenizer_for_counting_neither_pads_nor_cuts(name: str):
    tokenizer = load_tokenizer(Settings().embedding.models_path, name)
    assert len(tokenizer.encode("day").ids) == 3
    assert len(tokenizer.encode("day " * 1_000).ids) == 1_002


async def test_pooling_is_what_the_model_card_states(name: str):
    pool = {"all-minilm-l6-v2": lambda states: states.mean(axis=0), "bge-small-en-v1.5": lambda states: states[0]}[name]
    text = "A man is playing a guitar."
    path = Settings().embedding.models_path
    ids = np.array([load_tokenizer(path, name).encode(text).ids])
    session = onnxruntime.InferenceSession(path / name / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    expected = pool(session.run(None, inputs)[0][0])
    embedder = OnnxEmbedder(path, name, threads=1)
    # The other pooling gives a cosine below 0.96 here.
    assert (await embedder.embed_passages([text]))[0] @ expected / np.linalg.norm(expected) > 0.999
    await embedder.close()


async def test_a_question_does_not_wait_for_passages(name: str):
    embedder = OnnxEmbedder(Settings().embedding.models_path, name, threads=1)
    embed, texts = embedder._pools._embed, []
    embedder._pools._embed = lambda text: (texts.append(text), embed(text))[1]
    upload = asyncio.create_task(embedder.embed_passages(["a long passage of many words " * 30] * 100))
    await asyncio.sleep(0)
    await embedder.embed_query("why")
    assert not upload.done()
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    await embedder.close()
    assert len(texts) < 50, "cancelled passages were run all the same"
