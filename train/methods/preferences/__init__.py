"""The preference methods: DPO and its kin over pairs, KTO over thumbs; each a TRL trainer over applied policies."""
