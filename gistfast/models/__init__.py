"""What guides and students have in common: from a name to a loaded model.

hub               what is downloaded of a model
folder            a name becomes a folder that was looked at
adapter           LoRA adapters, merged
pretrained        a folder becomes a loaded model
encoder           the transformer in it
packed_texts      texts in one row, without padding; packed_attention, which keeps them apart
"""
