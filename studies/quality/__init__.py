"""Is ScMoE as good as top-2? Data, arms, runner and report of a study that anyone can repeat."""
