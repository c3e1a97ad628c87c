"""``freshline demo``: the complete pipeline on local servers, with local documents."""
