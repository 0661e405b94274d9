"""From a data set row to exact token ids: schema, reader, tokenizer, rendering, splits."""
