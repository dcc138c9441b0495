"""Texts as a student's tokenizer spells them."""

from gistfast.models.folder import model_folder
from gistfast.models.pretrained import Pooling, load_sentence_transformer


class StudentSpelling:
    """Texts as a student's tokenizer spells them: cut at its limit, tokenised and decoded.

    Attributes:
        name: The student, and the hash of its tokenizer.
    """

    def __init__(self, student: str, trust_remote_code: bool = False) -> None:
        folder = model_folder(student, trust_remote_code=trust_remote_code)
        self.name = f"{folder.name}@{folder.tokenizer_hash()}"
        # Loaded whole, because only the model itself knows where it cuts a text.
        pooling: Pooling | None = None if folder.is_sentence_transformer else "mean"
        model = load_sentence_transformer(folder, pooling=pooling, device="cpu", trust_remote_code=trust_remote_code)
        self._tokenizer = model.tokenizer

    def __call__(self, texts: list[str]) -> list[str]:
        """The texts, respelled."""
        ids = self._tokenizer(texts, truncation=True)["input_ids"]
        respelled: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return respelled
