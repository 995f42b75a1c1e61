"""One file per technique that learns: `fit(technique, model, tokenizer, progress) -> {name: tensor}`."""
