"""The format of packed shards: what lies in a folder, how it is written, adopted, checked and copied."""
