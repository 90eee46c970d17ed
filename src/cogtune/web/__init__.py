"""A page in the browser: pictures, chat, models side by side, closed questions."""
