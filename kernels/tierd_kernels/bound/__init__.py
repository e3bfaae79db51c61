"""The certificate of a row: from block statistics to the bound."""
