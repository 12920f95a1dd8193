"""Parts of the batch (`dp`, `pp`) and of the layers (`pp`)."""
