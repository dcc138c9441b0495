"""The model that is trained, and its tokens.

student     loaded, in the shape that the run asks for; with layers, shape, lora
tokenising  texts to tokens
tokens      of a whole store, made once
input       tokens to what the student takes; packed, in one row; compiled
"""
