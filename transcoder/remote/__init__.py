"""Object stores as source and destination: ranged reads, multi-part writes, one object written last as the commit.

S3 goes through botocore, the one client here with upload ids, conditional reads and conditional puts; Google's
store and `memory://` through obstore, `hf://` through huggingface_hub. All of them come with the extra `remote` and are
imported for their own URLs only.
"""
