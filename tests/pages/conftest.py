"""What tests of pages share: a lens of the model in the package."""

import pytest


@pytest.fixture(scope="session")
def lens():
    # Imported here: this file can be read before the environment of torch and Triton is set.
    from refinelens.lens.logit_lens import LogitLens
    from refinelens.model.loading import load_model

    loaded = load_model("tiny", "cpu")
    return LogitLens(loaded.model, loaded.tokenizer)
