"""A trained model behind HTTP, as the API of OpenAI."""
