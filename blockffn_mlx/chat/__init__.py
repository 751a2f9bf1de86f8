"""Conversations: messages to ids and stop texts, turns kept in the prompt cache, transcripts."""
