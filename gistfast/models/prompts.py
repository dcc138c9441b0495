"""The two roles of a text, and the prompts that models put before them."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Role = Literal["query", "document"]
ROLES: tuple[Role, Role] = ("query", "document")

# The names under which models keep the prompt of a role, best first.
_PROMPT_NAMES: dict[Role, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}


def own_prompt(model: "SentenceTransformer", role: Role) -> str:
    """The prompt that the model has for texts of a role, or for all texts; "" when it has none."""
    names = (*_PROMPT_NAMES[role], model.default_prompt_name or "")
    return next((prompt for name in names if (prompt := model.prompts.get(name))), "")
