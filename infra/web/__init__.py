"""What both HTTP services share: problem details, credentials, body limits, metrics, and how they listen."""
