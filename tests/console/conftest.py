"""A studio over the random tiny model, and its HTTP interface."""

from pathlib import Path

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the console extra is not installed")


@pytest.fixture(scope="session")
def studio_files(tmp_path_factory, make_pool) -> Path:
    """A pool with covers, a file that is none, and an index that is up to date."""
    folder = tmp_path_factory.mktemp("console")
    pool = make_pool(folder / "pool")
    Image.new("RGB", (400, 300), (200, 60, 20)).save(pool / "elephant.png")
    (pool / "neon.png").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def shared_pipe(studio_files: Path, tiny_weights: Path):
    from autolora.config import PipelineConfig
    from autolora.pipeline import AutoLoRAPipeline

    config = PipelineConfig(
        "random",
        weights=tiny_weights,
        pool=studio_files / "pool",
        index=studio_files / "index",
        device="cpu",
        steps=2,
        width=64,
        height=64,
    )
    return AutoLoRAPipeline(config)


@pytest.fixture
def studio(shared_pipe, tmp_path: Path):
    """A studio whose index is open."""
    from autolora.console.studio import Studio

    studio = Studio(shared_pipe, tmp_path / "outputs")
    studio.queue.wait(studio.reindex(), 60)
    studio.catalog.refresh(wait=True)
    yield studio
    studio.queue.close()


@pytest.fixture
def client(studio):
    from fastapi.testclient import TestClient

    from autolora.console.server import make_app

    with TestClient(make_app(studio, page=False)) as client:
        yield client
