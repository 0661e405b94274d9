"""The files of a run, which the control process and the training process share; imports no torch."""
