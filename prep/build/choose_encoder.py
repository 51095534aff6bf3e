"""Do tokenizer, template and encoder go together? Settled once, before any row is read."""

import json
import logging

from prep.inputs import Inputs
from prep.rendering.control.markers import printed_markers, required_markers, split_markers
from prep.rendering.spans import ROLE_KINDS, ends_turns
from prep.rendering.template import ChatTemplate
from prep.rendering.turns import learn_rules
from prep.tokenization.encoder import Encoder, encoder_spec
from prep.tokenization.tokenizer import CANARY_TEXT, LoadedTokenizer
from shared.errors import ConfigError
from shared.shard_format import Kind

logger = logging.getLogger(__name__)


def check_compatibility(inputs: Inputs, loaded: LoadedTokenizer) -> dict[str, int]:
    """Return the template's markers that take several tokens though they may -> how many.

    Raises ConfigError for a template that is not made for this tokenizer, and where `add_bos` would
    print nothing or a second BOS.
    """
    mixture, limit = inputs.mixture, loaded.model_max_length
    compiled = ChatTemplate(inputs.template, loaded.special_tokens, mixture.template.date)
    # A missing BOS, or two of them, would change every sample and be visible in none.
    if mixture.template.add_bos:
        bos = loaded.special_tokens.get("bos_token")
        if bos is None:
            raise ConfigError(
                f"template.add_bos = true, but the tokenizer {inputs.tokenizer.name!r} has no BOS"
                " token; leave it false"
            )
        if compiled.opening().startswith(bos * 2):
            raise ConfigError(
                f"template.add_bos = true, but the template {inputs.template.name!r} prints {bos!r}"
                " itself; leave it false"
            )
    if mixture.max_seq_len > limit:
        logger.warning(
            "max_seq_len = %d is over the %d tokens that the tokenizer %s says its model takes"
            " (model_max_length)",
            mixture.max_seq_len,
            limit,
            inputs.tokenizer.name,
        )
    return _check_markers(inputs, loaded, compiled)


def _check_markers(
    inputs: Inputs, loaded: LoadedTokenizer, compiled: ChatTemplate
) -> dict[str, int]:
    """Refuse split markers of a template that ships; warn of those of others and return them."""
    template = inputs.template
    markers = required_markers(template.name) if template.is_shipped else printed_markers(compiled)
    # A marker of a template that ships is known to be one token to its models; of another template
    # it may be meant as plain text.
    split = split_markers(markers, loaded.tokenizer)
    listed = ", ".join(
        f"{marker} ({f'{count} tokens' if count else 'unknown'})" for marker, count in split.items()
    )
    if split and template.is_shipped:
        raise ConfigError(
            f"template.name = {template.name!r}: its markers must be one token each, the"
            f" tokenizer {inputs.tokenizer.name!r} splits {listed}. Use a template that"
            " was made for it, or give it these tokens: tokenizer.add_tokens ="
            f" [{', '.join(map(json.dumps, split))}]"
        )
    if split:
        logger.warning(
            "the template %r prints %s: where a model knows such a marker as one token, another"
            " template or another tokenizer belongs here, or tokenizer.add_tokens; plain text by"
            " design is fine",
            template.name,
            listed,
        )
    return split


def check_turns(inputs: Inputs, template: ChatTemplate, control: tuple[str, ...]) -> None:
    """Raise ConfigError where the template never ends an assistant's turn."""
    terminators = inputs.mixture.template.terminators
    for token in terminators:
        if token not in control:
            raise ConfigError(
                f"template.terminators names {token!r}, which is no control token of the tokenizer"
                f" {inputs.tokenizer.name!r}; expected some of"
                f" {', '.join(control[:12])}{', ...' * (len(control) > 12)}"
            )
    rules = learn_rules(template, control, terminators)
    if inputs.mixture.mask.terminator != "none" and not ends_turns(template, rules):
        raise ConfigError(
            f"the template {inputs.template.name!r} prints no control token that ends an"
            " assistant's turn, so a model would not learn to stop. Use a template that ends"
            " turns; or name the tokens that do, though they open the next message, in"
            ' template.terminators; or set mask.terminator = "none" if that is wanted'
        )


def plain_kinds(roles: tuple[str, ...]) -> tuple[Kind, ...]:
    """Return the kinds of the text in messages of these roles."""
    kinds = {"assistant": (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL)}
    return tuple(kind for role in sorted(roles) for kind in kinds.get(role, (ROLE_KINDS[role],)))


def choose_encoder(
    loaded: LoadedTokenizer, control: tuple[str, ...], plain: tuple[Kind, ...], backend: str
) -> Encoder:
    """Return an encoder that uses gigatoken where it agrees with transformers, else transformers.

    The two are compared on the canary text. `control` are the tokens that only the template may
    make; `plain` the kinds whose texts hold no markup either.
    """
    if backend == "auto":
        encoder = Encoder(encoder_spec(loaded.tokenizer_json, control, "gigatoken", plain))
        try:
            if encoder.batch_ids(CANARY_TEXT) == encoder.ids_of(CANARY_TEXT):
                return encoder
            reason = "it gives other ids"
        except Exception as exc:  # gigatoken raises plain exceptions for what it does not support
            reason = str(exc)
        logger.warning(
            "gigatoken cannot encode for this tokenizer (%s); transformers does, more slowly",
            reason,
        )
    return Encoder(encoder_spec(loaded.tokenizer_json, control, "transformers", plain))
