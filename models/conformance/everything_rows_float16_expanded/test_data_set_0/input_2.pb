
Bper_sample_weightsJm¿8R<ª±~µá1â∂ê9d.Ò∏m<„;