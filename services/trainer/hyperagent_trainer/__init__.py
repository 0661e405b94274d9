"""The trainer: distills the teacher into a hypernetwork for a frozen student, under a control endpoint."""
