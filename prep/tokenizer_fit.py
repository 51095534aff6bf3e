"""Do tokenizer, template and encoder fit together? Settled once, before any row is read."""

import logging

from prep.encode import Encoder, encoder_spec
from prep.inputs import Inputs
from prep.template import ChatTemplate
from prep.tokenizer import CANARY_TEXT, LoadedTokenizer
from shared.errors import ConfigError

logger = logging.getLogger(__name__)


def check_bos(inputs: Inputs, loaded: LoadedTokenizer) -> None:
    """Raise ConfigError where `add_bos` would print nothing, or a second BOS."""
    if not inputs.mixture.template.add_bos:
        return
    bos = loaded.special_tokens.get("bos_token")
    if bos is None:
        raise ConfigError(f"template.add_bos = true, but the tokenizer {inputs.tokenizer.name!r} has no BOS token")
    template = ChatTemplate(inputs.template, loaded.special_tokens, inputs.mixture.template.date)
    if template.opening().startswith(bos * 2):
        raise ConfigError(
            f"template.add_bos = true, but the template {inputs.template.name!r} prints {bos!r} itself; leave it false"
        )


def choose_encoder(loaded: LoadedTokenizer, asked: str) -> Encoder:
    """Return gigatoken where it takes this tokenizer and gives the referee's ids for the canary, else transformers."""
    if asked == "auto":
        encoder = Encoder(encoder_spec(loaded.tokenizer_json, loaded.control_tokens, "gigatoken"))
        try:
            if encoder.batch_ids(CANARY_TEXT) == encoder.ids_of(CANARY_TEXT):
                return encoder
            reason = "it gives other ids"
        except Exception as exc:  # gigatoken refuses with plain exceptions of its own; the referee then does the work
            reason = str(exc)
        logger.warning("gigatoken cannot encode for this tokenizer (%s); transformers does, more slowly", reason)
    return Encoder(encoder_spec(loaded.tokenizer_json, loaded.control_tokens, "transformers"))
