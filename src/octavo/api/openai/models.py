"""``/v1/models``: the names under which the model is served."""

from __future__ import annotations

from octavo.api.openai.context import Context
from octavo.api.openai.schema import ModelCard, ModelList


def list_models(context: Context) -> ModelList:
    """All served names."""
    return ModelList(data=[_card(context, name) for name in context.served_model_names])


def retrieve_model(context: Context, name: str) -> ModelCard:
    """One served name; ``ModelNotServedError`` for any other."""
    return _card(context, context.check_model(name))


def _card(context: Context, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=context.created_s,
        root=context.info.model,
        max_model_len=context.info.max_model_len,
    )
