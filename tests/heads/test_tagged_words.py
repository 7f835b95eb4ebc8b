"""The head of tagged words: weights in its loss, and O wherever the labels list it."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import CrossEntropyLoss

from peftkit.heads.token_classification import IGNORE, TokenClassification
from peftkit.schema.types import TaskInfo


def head(*labels, weights=None):
    return TokenClassification(TaskInfo("token_classification", labels, weights))


class Fixed(torch.nn.Module):
    """Gives the same logits for every batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids=None, attention_mask=None):
        return self


@pytest.mark.parametrize("weights", [None, (0.25, 1.0, 3.0)])
def test_the_loss_is_torchs_times_the_weights_of_the_tags(weights):
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORE, 0, 1, 2], [IGNORE, 0, 0, IGNORE]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": labels}
    loss = head("O", "B-PER", "I-PER", weights=weights).loss(Fixed(logits), batch, "own")
    expected = CrossEntropyLoss(None if weights is None else torch.tensor(weights), reduction="sum")
    torch.testing.assert_close(loss, expected(logits.reshape(-1, 3), labels.reshape(-1)))


@pytest.mark.parametrize("labels", [("O", "B-PER", "I-PER"), ("B-PER", "I-PER", "O")])
def test_words_without_a_token_are_outside_wherever_o_is_listed(labels):
    outputs = {"row": [0], "words": [[0]], "gold": [[labels.index("O")]], "predicted": [[labels.index("B-PER")]],
               "probability": [[0.9]], "unread": [[1]], "unread_gold": [[labels.index("O")]]}  # fmt: skip
    row = {"text": "king \u200d", "starts": [0, 5], "ends": [4, 6]}
    (tagged,) = head(*labels).answers({name: np.array(values) for name, values in outputs.items()}, [row], None)
    assert [(span.text, span.label) for span in tagged.spans] == [("king", "PER")]


@pytest.mark.parametrize(("labels", "tags", "unknown"), [
    (("B-PER", "I-PER", "O"), ["B-PER", "O", "B-PER"], "O"), (("ADJ", "NOUN"), ["NOUN", "ADJ", "NOUN"], "NOUN"),
])  # fmt: skip
def test_the_baseline_gives_unknown_words_o_or_the_commonest_tag(labels, tags, unknown):
    words = {"text": "king day lord", "starts": [0, 5, 9], "ends": [4, 8, 13]}
    train = Dataset.from_list([{**words, "labels": tags}])
    rows = Dataset.from_list([{"text": "king of", "starts": [0, 5], "ends": [4, 7], "labels": tags[:2]}])
    outputs, note = head(*labels).lookup_outputs(train, rows)
    assert [labels[tag] for tag in outputs["predicted"][0]] == [tags[0], unknown]
    assert f"'{unknown}' for the 50%" in note
