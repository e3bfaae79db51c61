"""What the score pass leaves of a row and block: float32 [NUM_STATISTICS, ...], one plane a statistic.

With w_t = e^{s_t - m} over the block's visible tokens and m the largest of their scores, so that nothing overflows.
"""

(
    MAX_SCORE,  # m
    SUM,  # sum w
    SUM_SQUARES,  # sum w^2
    SUM_NORM,  # sum w nu
    SUM_SQUARES_NORM,  # sum (w nu)^2
    SUM_ERROR,  # sum w eta
    SUM_SQUARE_USED,  # sum w (nu + eta)^2, at least sum w ||V used||^2
    SUM_SQUARE_ERROR,  # sum w eta^2
    DELTA,  # at least any token's score error
    D_NORM,  # at least the errors' Euclidean norm
    EPSILON,  # the part of DELTA that original keys would have too
) = range(11)
NUM_SUMS = SUM_SQUARE_ERROR - SUM + 1
NUM_STATISTICS = 11
