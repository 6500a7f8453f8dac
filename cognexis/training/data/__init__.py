"""Training data: from text to token shards, and from token shards to batches that resume exactly.

    text, JSONL, Parquet, Arrow  --build-->  token shards + data_manifest.json  --open-->  rows  --loader-->  batches

What a training run uses:

    from cognexis.training.data.opening import open_data

    data = open_data("data/train", sequence_length=2048, vocab_size=..., tokenizer_checksum=...)   # -> TokenData
    loader = data.training_loader(seed=1234, batch_size=2, rank=rank, world_size=world, num_workers=2,
                                  prefetch_batches=8, window=None)                                 # -> TrainingLoader
    for batch in loader: ...           # endless; a dict of int64 tensors [B, sequence_length + 1]:
                                       # input_ids, labels (unshifted), attention_mask, position_ids, document_ids
    loader.state_dict()                # < 1 KiB of JSON, equal on all ranks: the rows used so far
    loader.state_after(num_batches)    # the same from a count of batches since position 0
    loader.load_state_dict(state)      # any world size, batch size and number of workers; before iter(loader)
    loader.metrics.as_dict()           # data/load_ms, data/wait_ms, data/queue_depth, data/batches
    data.checksum                      # of the manifest: for logs and TrainingRecord.data_manifest_checksum
    data.evaluation_loader(batch_size=4, rank=rank, world_size=world)      # a DataLoader: each row once, no shuffle

``TrainingLoader`` is no ``torch.utils.data.DataLoader``: ``accelerator.prepare`` leaves it alone, and a ``Trainer``
whose ``get_train_dataloader`` returns it iterates it as it is. A batch counts as consumed when it is handed out. Rows
of anybody's map-style dataset (``datasets.Dataset`` too) work alike:

    TrainingLoader(dataset, RowOrder(len(dataset), seed=1234), RowCollator(pad_token_id), batch_size=2)

With a plain ``DataLoader`` or a prepared one, ``RowSampler(order, position)`` gives the same order.

| module | what it has |
| --- | --- |
| ``permutation``, ``order``, ``partition`` | the order of rows as a function of (seed, position); shares of ranks |
| ``loader``, ``loader_state``, ``sampler``, ``prefetch``, ``metrics`` | batches, their state, working ahead |
| ``packing``, ``blocks``, ``collating``, ``loop_metadata`` | rows of documents, batches, what a batch says of loops |
| ``token_shard``, ``shard_writer``, ``manifest``, ``verify``, ``opening`` | the files and their checks |
| ``sources``, ``inputs``, ``corruption``, ``chat``, ``pipeline``, ``build`` | from records to shards |
| ``corpus``, ``mixing``, ``leaks``, ``views``, ``commands`` | installed text, mixtures, ``datasets``, commands |
"""
