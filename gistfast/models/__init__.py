"""What guides and students have in common: from a name to a loaded model.

hub               what is downloaded of a model
folder            a name becomes a folder that was looked at
adapter           LoRA adapters, merged
pretrained        a folder becomes a loaded model
packed_attention  of a model that takes texts in one row, without padding
"""
