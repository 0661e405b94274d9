"""Conversion of data set rows to exact token ids: schema, reader, tokenizer, rendering, splits."""
