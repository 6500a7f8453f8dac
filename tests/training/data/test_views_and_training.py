"""The data in the hands of the `datasets` library, of a plain Trainer and of a model."""

import itertools

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.training.data.collating import RowCollator
from cognexis.training.data.loader import TrainingLoader
from cognexis.training.data.opening import open_data
from cognexis.training.data.order import RowOrder
from cognexis.training.data.packing import Packing, pack_documents
from cognexis.training.data.views import iterable_rows, row_dataset


@pytest.fixture
def data(tmp_path, write_jsonl, build):
    build(write_jsonl([{"text": f"document number {index}"} for index in range(40)]), shard_tokens=300)
    return open_data(tmp_path / "out", sequence_length=15, vocab_size=266)


def model(**settings) -> CognexisForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    blocks = {"num_prelude_blocks": 1, "num_coda_blocks": 1, "trained_max_loops": 2, "default_loops": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return CognexisForCausalLM(CognexisConfig(vocab_size=266, **sizes, **blocks, **ids, **settings))


def test_streamed_rows_are_those_by_number_and_in_the_given_order(data):
    plain = list(iterable_rows(data))
    assert isinstance(iterable_rows(data), datasets.IterableDataset)
    assert [row["input_ids"] for row in plain] == [data.rows[i]["input_ids"].tolist() for i in range(len(data.rows))]
    order = data.order(seed=2)
    shuffled = [row["input_ids"] for row in iterable_rows(data, order)]
    assert shuffled == [plain[index]["input_ids"] for index in order.rows(0, order.rows_per_epoch)]


def test_rows_by_number_as_a_dataset(data):
    rows = row_dataset(data)
    assert isinstance(rows, datasets.Dataset) and len(rows) == len(data.rows)
    assert torch.equal(torch.as_tensor(rows[3]["labels"]), data.rows[3]["labels"])
    assert torch.equal(torch.as_tensor(rows[[5, 1]]["input_ids"][1]), data.rows[1]["input_ids"])


def test_dataset_of_a_user_is_loaded_and_resumed(data):
    given = datasets.Dataset.from_dict({"input_ids": [[10 + i, 11, 12 + i % 3] for i in range(30)]})

    def make():
        return TrainingLoader(given, RowOrder(30, seed=5), RowCollator(2), batch_size=4)

    whole = [batch["input_ids"] for batch in itertools.islice(make(), 12)]
    first = make()
    for _ in itertools.islice(first, 5):
        pass
    second = make()
    second.load_state_dict(first.state_dict())
    rest = [batch["input_ids"] for batch in itertools.islice(second, 7)]
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_evaluation_reads_each_row_once_over_the_ranks(data):
    seen = []
    for rank in range(3):
        loader = data.evaluation_loader(batch_size=2, rank=rank, world_size=3)
        for _ in range(2):  # it can be read again
            rows = [row for batch in loader for row in batch["input_ids"]]
        seen.append(rows)
    expected = [data.rows[index]["input_ids"] for rank in range(3) for index in range(rank, len(data.rows), 3)]
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*seen), expected, strict=True))


@pytest.mark.parametrize("is_closed", [True, False])
def test_changing_a_document_leaves_the_next_one_alone_only_behind_a_boundary(is_closed):
    network = model(document_boundary_attention=is_closed).eval()
    documents = [[20, 21, 22], [30, 31, 32]]
    changed = [[25, 26, 27], [30, 31, 32]]
    packing = Packing(7, 2, position_reset="reset" if is_closed else "continue")
    batches = [RowCollator(2)(pack_documents(given, packing, 4)) for given in (documents, changed)]
    with torch.no_grad():
        first, second = (network(**batch, use_cache=False).logits[0, 4:] for batch in batches)
    assert torch.allclose(first, second, atol=1e-6) is is_closed


def arguments(folder, **settings) -> TrainingArguments:
    fixed = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(str(folder), per_device_train_batch_size=4, max_steps=6, **fixed, **settings)


def test_plain_trainer_takes_the_rows_as_they_are(tmp_path, data):
    trainer = Trainer(model(), arguments(tmp_path / "run"), data_collator=data.collator(), train_dataset=data.rows)
    result = trainer.train()
    assert result.global_step == 6 and 0 < result.training_loss < 10


def test_trainer_reads_the_loader_of_a_rank_unchanged(tmp_path, data):
    used = []

    class LoaderTrainer(Trainer):
        def get_train_dataloader(self):
            return data.training_loader(seed=7, batch_size=4)

        def training_step(self, model, inputs, num_items_in_batch=None):
            used.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = LoaderTrainer(model(), arguments(tmp_path / "run"), train_dataset=data.rows)
    trainer.train()
    order = data.order(seed=7)
    expected = [data.rows[index]["input_ids"] for index in order.rows(0, 24)]
    assert torch.equal(torch.cat(used), torch.stack(expected))
