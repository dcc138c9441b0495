"""What a model is worth: retrieval, judged pairs, and tables and pictures of the results."""
