	
Bper_sample_weightsJ#:{œ@9Ñ<T'Ò9:^@ù´