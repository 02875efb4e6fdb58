"""Operations with a plain reference, a blocked XLA form and accelerator kernels.

Nothing here imports ``tokenlab``.
"""
