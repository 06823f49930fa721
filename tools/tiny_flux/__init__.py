"""How the embedded model tiny-flux is made: its pictures, captions, tokenizers, training and export."""
