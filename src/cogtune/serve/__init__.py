"""An OpenAI-compatible server over the engine (`cogtune serve`)."""
