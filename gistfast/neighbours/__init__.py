"""What a store's vectors say of each other: scores, ranks, false and hard negatives.

scorer        the guides' score of two texts
pair_scores   of every pair of the rows
exact, tiles  nearest candidates by comparing everything
index         the FAISS index; with index_types, index_build, index_recall, index_check
index_search  nearest candidates by the one or the other
mining        ranks and negatives of every row
"""
