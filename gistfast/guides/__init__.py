"""Texts in, vectors out: the guides.

kinds, open_guide      which kind --guide names, and how it is opened
guide                  a model of this machine; with attention, token_batches, token_budget, precision,
packed_linear, ahead and spelling
server_guide           a model behind a server; with server_requests, server_answers, embedding_server
ready_guide            vectors that are there already; with ready_texts, ready_vectors
info                   what tells one guide from every other
recorded_guide         the guide that a store records, opened again; same_guide, whether it is the same
directions, batch_done what all of them do with their vectors, and report
bench                  texts a second, beside sentence-transformers
"""
