from __future__ import annotations

import pytest

from passdeploy.config import make_config
from passdeploy.errors import BadInput
from passdeploy.subject import load_subject
from tests import scripted


@pytest.mark.parametrize("prompt", [{"kind": "expansive"}, {"kind": "expansive", "width": 6}])
def test_an_expansive_prompt_has_to_leave_an_image(prompt: dict[str, object]) -> None:
    config = make_config({"model": "tiny-resnet", "data": "stripes", "prompt": prompt})
    with pytest.raises(BadInput, match="takes 1 to 5 pixels; set prompt"):
        load_subject(config, data=scripted.data())
    load_subject(
        config.model_copy(update={"prompt": config.prompt.model_copy(update={"width": 5})}), data=scripted.data()
    )
