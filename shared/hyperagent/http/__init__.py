"""What every REST service shares: problem details, bearer auth, limits, serving, and the client."""
