"""Which prediction, anchor or proposal answers for which ground-truth object."""
