"""The quickstart: the three stages on text and models that come with the install."""
