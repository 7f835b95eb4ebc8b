"""Many runs of one question: ``compare`` sets methods side by side, ``tune`` searches hyperparameters."""
