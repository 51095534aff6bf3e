"""Do tokenizer, template and encoder fit together? Settled once, before any row is read."""

import logging

from prep.encode import Encoder, encoder_spec
from prep.inputs import Inputs
from prep.spans import ROLE_KINDS, ends_turns
from prep.template import ChatTemplate
from prep.tokenizer import CANARY_TEXT, LoadedTokenizer
from prep.turns import learn_rules
from shared.errors import ConfigError
from shared.shard_format import Kind

logger = logging.getLogger(__name__)


def check_template(inputs: Inputs, template: ChatTemplate, loaded: LoadedTokenizer, control: tuple[str, ...]) -> None:
    """Raise ConfigError where the template would print no BOS or two of them, or never ends an assistant's turn."""
    _check_bos(inputs, template, loaded.special_tokens.get("bos_token"))
    asked = inputs.mixture.template.terminators
    for token in asked:
        if token not in control:
            raise ConfigError(
                f"template.terminators names {token!r}, which is no control token of the tokenizer "
                f"{inputs.tokenizer.name!r}; expected some of {', '.join(control)}"
            )
    rules = learn_rules(template, control, asked)
    if inputs.mixture.mask.terminator != "none" and not ends_turns(template, rules):
        raise ConfigError(
            f"the template {inputs.template.name!r} prints no control token that ends an assistant's turn, so a model "
            "would not learn to stop. Use a template that ends turns; or name the tokens that do, though they open "
            'the next message, in template.terminators; or set mask.terminator = "none" if that is wanted'
        )


def _check_bos(inputs: Inputs, template: ChatTemplate, bos: str | None) -> None:
    if not inputs.mixture.template.add_bos:
        return
    if bos is None:
        raise ConfigError(f"template.add_bos = true, but the tokenizer {inputs.tokenizer.name!r} has no BOS token")
    if template.opening().startswith(bos * 2):
        raise ConfigError(
            f"template.add_bos = true, but the template {inputs.template.name!r} prints {bos!r} itself; leave it false"
        )


def plain_kinds(roles: tuple[str, ...]) -> tuple[Kind, ...]:
    """Return the kinds of what messages of these roles say."""
    kinds = {"assistant": (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL)}
    return tuple(kind for role in sorted(roles) for kind in kinds.get(role, (ROLE_KINDS[role],)))


def choose_encoder(loaded: LoadedTokenizer, control: tuple[str, ...], plain: tuple[Kind, ...], backend: str) -> Encoder:
    """Return gigatoken where it takes this tokenizer and gives the referee's ids for the canary, else transformers.

    `control` are the tokens that only the template may make; `plain` the kinds whose texts hold no markup either.
    """
    if backend == "auto":
        encoder = Encoder(encoder_spec(loaded.tokenizer_json, control, "gigatoken", plain))
        try:
            if encoder.batch_ids(CANARY_TEXT) == encoder.ids_of(CANARY_TEXT):
                return encoder
            reason = "it gives other ids"
        except Exception as exc:  # gigatoken refuses with plain exceptions of its own; the referee then does the work
            reason = str(exc)
        logger.warning("gigatoken cannot encode for this tokenizer (%s); transformers does, more slowly", reason)
    return Encoder(encoder_spec(loaded.tokenizer_json, control, "transformers", plain))
